"""Worker beam loop, engine actor, reference engine, fleet, weight channel."""
