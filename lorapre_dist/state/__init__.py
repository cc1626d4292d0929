"""The optimizer's state as others know it: ``torch.optim``, DTensors, files, whole on one rank."""
