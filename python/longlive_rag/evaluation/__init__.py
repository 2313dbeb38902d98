"""Measuring videos and memory."""
