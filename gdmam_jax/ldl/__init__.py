"""Label distribution learning under imbalance: a laboratory around RDA and GDMAM.

- `losses`: the distribution-balanced family, Kullback-Leibler, Jensen-Shannon, squared, RDA's parts
- `measures`: the six measures, Euclidean distances over all, head and tail labels
- `models`: `RDA` and its two losses, a convolutional encoder for images
- `imbalance`: samplers that make a training set imbalanced, statistics
- `data`: loading, checking and fetching data sets, the built-in films, the papers' folds
- `files`: what `data` reads: CSV, NumPy and MATLAB files
- `laboratory`: experiments, their methods and reports

The command line is `gdmam-ldl`, or `python -m gdmam_jax.ldl`. Needs the extra `gdmam-jax[ldl]`;
what only some functions need (pandas, scikit-learn, matplotlib) is imported when they run.
"""

from gdmam_jax.ldl.data import Dataset as Dataset
from gdmam_jax.ldl.data import Folds as Folds
from gdmam_jax.ldl.data import fetch as fetch
from gdmam_jax.ldl.data import films as films
from gdmam_jax.ldl.data import find as find
from gdmam_jax.ldl.data import from_arrays as from_arrays
from gdmam_jax.ldl.data import load as load
from gdmam_jax.ldl.data import make_folds as make_folds
from gdmam_jax.ldl.imbalance import RELEASED_THRESHOLDS as RELEASED_THRESHOLDS
from gdmam_jax.ldl.imbalance import Factor as Factor
from gdmam_jax.ldl.imbalance import FoundThresholds as FoundThresholds
from gdmam_jax.ldl.imbalance import Thresholds as Thresholds
from gdmam_jax.ldl.imbalance import head_labels as head_labels
from gdmam_jax.ldl.imbalance import imbalance_statistics as imbalance_statistics
from gdmam_jax.ldl.losses import class_balanced_loss as class_balanced_loss
from gdmam_jax.ldl.losses import class_frequency as class_frequency
from gdmam_jax.ldl.losses import cross_entropy as cross_entropy
from gdmam_jax.ldl.losses import distribution_balanced as distribution_balanced
from gdmam_jax.ldl.losses import focal_loss as focal_loss
from gdmam_jax.ldl.losses import jensen_shannon as jensen_shannon
from gdmam_jax.ldl.losses import kullback_leibler as kullback_leibler
from gdmam_jax.ldl.losses import squared as squared
from gdmam_jax.ldl.measures import HIGHER_IS_BETTER as HIGHER_IS_BETTER
from gdmam_jax.ldl.measures import MEASURES as MEASURES
from gdmam_jax.ldl.measures import measure as measure
from gdmam_jax.ldl.models import RDA as RDA
from gdmam_jax.ldl.models import ConvolutionalEncoder as ConvolutionalEncoder
from gdmam_jax.ldl.models import draw_noise as draw_noise
from gdmam_jax.ldl.models import rda_losses as rda_losses
