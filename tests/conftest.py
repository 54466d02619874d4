"""For all tests: hypothesis fails no example for being slow. A loaded machine is not a bug; what
must have a bound states it itself.
"""

from hypothesis import settings

settings.register_profile("trueweight", deadline=None)
settings.load_profile("trueweight")
