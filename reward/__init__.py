"""Reward service, ranker networks, rules, ranking metrics."""
