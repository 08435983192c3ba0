"""Companion systems of the survey that names Tandem RL. Nothing in the lesson imports them."""

import lab  # noqa: F401  sets an environment variable that torch reads when it is imported
