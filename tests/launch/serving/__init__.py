"""Tests of `launch.serving`."""
