"""Plans: what training will allocate, compute and send, before anything is allocated."""

from steepest.planning.sharded import PlannedUnit, ShardedPlan, plan_sharded

__all__ = ["PlannedUnit", "ShardedPlan", "plan_sharded"]
