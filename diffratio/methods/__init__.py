"""What decides the plans; one file a method."""

from diffratio.methods.base import Method, MethodConfig, config_from_json, config_to_json, get_method, methods

__all__ = ["Method", "MethodConfig", "config_from_json", "config_to_json", "get_method", "methods"]
