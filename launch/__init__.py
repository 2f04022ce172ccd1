"""Command line, configuration, recipes, cluster, report, doctor."""
