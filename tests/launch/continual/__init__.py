"""Tests of launch.continual."""
