"""Serving: what a policy shows, the exposure log, the HTTP service that follows the registry, batch recommendation."""
