"""What a transformer family is; one file a family."""

from diffratio.backbones.base import Backbone, backbone_of, backbones, check_classes, get_backbone

__all__ = ["Backbone", "backbone_of", "backbones", "check_classes", "get_backbone"]
