"""What every optimizer must honour, checked for every registered rule.

The table of rules is the registry itself (``cases.py`` adds option variants), so that a rule added later
is covered without an edit. What cannot apply to a rule follows from its phases and options, or stands in
``cases.PECULIAR``; test_inapplicable.py holds that against what every rule does. Rules that take no
vectors are given matrices, two of one shape. Matrix rules are compared bit for bit as all others: a
stack's products are those of its matrices. Each line of the contract and where it is checked:

torch.optim's contract, written and unwritten

- construction, forms of ``params``, unknown keywords, refused parameters: test_construction.py
- every hyper-parameter's range, in the constructor, a group and a checkpoint: test_hyper_ranges.py
- tensor learning rates: test_tensor_lr.py
- unknown keys of a group; ``add_param_group`` after steps: test_groups.py
- all in ``defaults``, ``param_groups``, ``state``: deepcopy, pickle, older pickles: test_copies.py
- ``momentum`` or ``betas`` in ``defaults``: test_construction.py, test_schedulers.py
- ``p.grad`` as it was: test_gradients.py; the closure once, gradients that exist only after it:
  test_closure.py; hooks in torch's order: test_hooks.py
- gradients that are None, late, frozen and thawed, zero; no gradient at all: test_gradients.py
- the zero-gradient step of torch.distributed.checkpoint: test_first_step.py
- ``maximize``: test_maximize.py; complex parameters: test_complex.py; strides, 0-dim, empty:
  test_layouts.py; mixed dtypes and ``grad_dtype``: test_dtypes.py; sparse gradients: test_sparse.py
- what a state dict holds, ``weights_only``, every dtype kept, no memory shared: test_state_dict.py;
  one that does not fit: test_bad_state_dict.py
- exact resume in a new process, by file, flat dict and torch.distributed.checkpoint: test_resume.py;
  its other habits: test_distributed_checkpoint.py
- shards over four processes, all rules bit for bit as whole tensors: test_sharded.py
- GradScaler: test_grad_scaler.py; every scheduler: test_schedulers.py
- ``swap_in_optimizer_params_and_state`` and parameters replaced in the groups: test_swapped_in.py
- ``torch.compile(optimizer.step)``: test_compiled_step.py

Common options

- ``weight_decay_method``: test_weight_decay.py; ``state_dtype``: test_dtypes.py
- ``rounding``: test_rounding.py; low precision is computed in float32: test_dtypes.py
- ``nonfinite``: test_nonfinite.py, on an accelerator test_device_mask.py and test_gpu.py
- ``compile``: test_compiled.py; per group: test_groups.py; several rules at once: test_several_rules.py
- ``views``, fused parameters: test_views.py; ``bucket_bytes``: test_layouts.py
- a step that fails, and the global generators: test_failures.py

Traps

- a NaN gradient is silent in sign descent; a momentum that met one is frozen: test_nonfinite.py
- a bfloat16 decay that rounds to nothing; unseeded rounding: test_rounding.py
- state restored in the wrong dtype: test_state_dict.py; measured again or reset: test_resume.py
- a closure called twice: test_closure.py; ``p.grad`` overwritten: test_gradients.py
- options lost by deepcopy: test_copies.py; an unknown keyword accepted: test_construction.py
"""
