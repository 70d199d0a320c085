"""Schedulers, pipelines and generation; import from the modules, since diffusers' pipelines take seconds to load."""
