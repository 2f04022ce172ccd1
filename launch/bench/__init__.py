"""`windlass bench`: what is timed, against what, and whether it was right."""
