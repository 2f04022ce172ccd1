"""Submission: any windlass command as a Ray job, a Slurm job or a KubeRay RayJob."""
