"""torch.compile, once: everything that knows about Dynamo and Inductor."""
