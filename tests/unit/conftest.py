"""Settings of hypothesis for all unit tests."""

from hypothesis import settings

# A machine that is busy with other things takes any time over an example.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
