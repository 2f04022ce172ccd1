"""Logs, interactions, catalogue, semantic IDs, item trie, constraints, prompts."""
