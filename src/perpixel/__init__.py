"""perpixel: boxes, keypoints and instance masks predicted at every location of a feature pyramid."""

__version__ = "0.1.0"
