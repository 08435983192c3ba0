"""Companion systems of the survey that names Tandem RL: each file stands alone, and nothing in the lesson imports them."""

import lab  # noqa: F401  sets an environment variable that torch reads when it is imported
