"""Everything that turns jobs into steps: protocol, messages, supervisor, worker, scheduler, sampler and kernels."""
