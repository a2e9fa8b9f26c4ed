"""How many replicas a variant needs: the policy that Serve's controller calls, and a simulator that runs it."""

from serve_app.autoscaling.policy import DrainTime

__all__ = ["DrainTime"]
