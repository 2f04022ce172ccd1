"""Settings of the service."""

from __future__ import annotations

from pydantic import Field

from launch.serving.exposure import ExposureSettings


class ServeSettings(ExposureSettings):
    """How the service answers and logs."""

    host: str = "127.0.0.1"
    """Address to listen on. Any address but a loopback one requires the token."""
    port: int = Field(8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    token_env: str = Field("WINDLASS_SERVE_TOKEN", min_length=1)
    """Environment variable with the bearer token; the token itself never stands on a command line."""
    max_items: int = Field(50, ge=1, le=1024)
    """Most items of an answer."""
    max_history: int = Field(10_000, ge=1)
    """Most items of a history in a request."""
    max_body_mib: float = Field(1.0, gt=0, le=1024)
    """Largest request body, MiB."""
    max_batch: int = Field(64, ge=1)
    """Most requests that one call of the engines answers."""
    batch_wait_ms: float = Field(0.0, ge=0, le=10_000)
    """How long a request waits for others to share a call; while a call runs, they gather anyway."""
    max_waiting: int = Field(1024, ge=1)
    """Requests that may be under way; further ones are refused."""
    response_window_s: float = Field(86_400.0, ge=60)
    """Seconds in which a request may be responded to; its day is closed when the last one's are over. At least 60, so
    that what is under way at midnight finds its day open."""
    poll_s: float = Field(2.0, gt=0)
    """Seconds between two looks at `current` and at days that can be closed."""
    drain_s: float = Field(60.0, gt=0)
    """Seconds that requests under way get when the service is stopped."""
    draw_seed: int | None = Field(None, ge=0, lt=2**31)
    """Seed of the draws; by default another one at every start."""
    test_clock_s: float = 0.0
    """Test-only: seconds added to the clock."""
