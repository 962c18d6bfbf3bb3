"""What each torch function does to a spike train: one small rule per operation.

The stream's part of a rule runs on time folded into the batch; the rate's part is the same map where the map is
affine for each image, and one of the functions of `models.linear_rate` where its value is known already. Importing
this package fills `models.spiketrain.RULES`.
"""

from models.rules import arithmetic, layers, shapes  # noqa: F401
from models.rules.base import affine, constant_of_rate, rate_rule

__all__ = ["affine", "constant_of_rate", "rate_rule"]
