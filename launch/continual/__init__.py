"""Continual retraining from the feedback log: journal, updates, guard, registry."""
