"""Mutual learning with reliable pseudo labels: a reproducible study of semi-supervised 3-D segmentation."""
