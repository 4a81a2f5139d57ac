"""One loss a file, each a pure function whose sums are divided by the counts of the *global* batch.

So N workers that each see a slice of a batch add up to what one worker computes.
"""

from richkd.losses.contrast import contrast, similarities
from richkd.losses.cross_entropy import cross_entropy
from richkd.losses.decoupled import dkd
from richkd.losses.kd import kd

__all__ = ["contrast", "cross_entropy", "dkd", "kd", "similarities"]
