"""Bad flags, damaged and hostile files, as .ci/run asks for them: python tests/bad_input.py

They are ordinary tests; the last line has their number.
"""

import pytest

if __name__ == "__main__":
    raise SystemExit(pytest.main(["-q", "tests", "-k", "bad_flags_are_named or hostile"]))
