"""Plans: what training will allocate, compute and send, before anything is allocated."""

from steepest.planning.comparison import Comparison, compare_plans
from steepest.planning.memory import Plan, PlanRow
from steepest.planning.planner import plan
from steepest.planning.sharded import PlannedUnit, ShardedPlan, plan_sharded

__all__ = [
    "Comparison",
    "Plan",
    "PlanRow",
    "PlannedUnit",
    "ShardedPlan",
    "compare_plans",
    "plan",
    "plan_sharded",
]
