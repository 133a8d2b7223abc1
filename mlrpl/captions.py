"""What stands beside tables and figures, in Markdown: the same on a study's page and in its notebooks."""

COMPARISON = """Decoder 1, by the weights after the final iteration. *Published*: by the weights that did best on the
test cases among regular checks, as the literature reports it, so it is optimistic. Mean over test cases; of two seeds
both, of more their mean ± standard deviation. A distance is undefined where a method finds nothing of a class; such a
case counts as Dice 0 and is left out of the distances (the published code averages zeros there)."""
EVERY = """Decoder 1, and the mean of the decoders' probabilities; by the *last* weights, those after the final
iteration, and by the *published* selection."""
FOLDS = """A cross-validation in {} parts: every labelled case is measured by a network that did not learn from it, and
is a test case here. `mlrpl predict` averages the networks of all parts, which these figures do not measure. """
BY_CLASS = "Final weights of decoder 1, and Dice by the published selection; means over the test cases and the seeds."
BY_CASE = "{}, final weights of decoder 1; the case with the lowest Dice comes first."
COST = """Seconds are those of an undisturbed step, since runs may share a machine: the tenth percentile over stretches
of 20 iterations, of a method's runs the shortest; memory is the largest of its runs. Runs that shared a GPU from
beginning to end have no undisturbed step. Only steps of one machine compare, and one name may stand for several: the
page *Speed* has all methods side by side. Passes without gradient count as volumes too."""
LARGEST = """Dice (%) and 95HD of decoder 1 as predicted, and with each class's largest connected component alone. It is
no part of the protocol here; much published code evaluates so, and whether the paper's figures were obtained with it is
not known. Islands far off cost little Dice and much distance. Means over the seeds that have rows for it."""
NORMALISATION = """Dice (%) of the final weights, decoder 1. Training normalises each batch by its own statistics, its
unlabelled volumes included; prediction by their running averages, as published. The second column uses the statistics
of the volume that is predicted instead (of its windows, four at a time). The difference is what the averages cost; what
is still missing then, the features lack."""
OPTIMISM = "Points of Dice by which choosing the weights on the test cases exceeds the final weights."
PRECISION = """Runs that differ in nothing but precision and seed. Rounding alone makes runs of one seed part ways, so
curves are compared with the range of float32's seeds: the share of training that reduced precision's mean over seeds,
and its single runs, spend within it, and what single runs would if precision made no difference. Such single runs leave
a range of n seeds 2 of n + 1 times; their mean leaves it more rarely, how much so the seeds' spread decides."""
SURE = """Intervals are bootstrapped over the test cases, each averaged over its seeds. Wilcoxon's signed-rank test
pairs the same cases of a method and of what it is compared with, over the seeds that both have, with Holm's correction
over the methods at one number of labelled cases. What names a condition in brackets, such as instance norm, is compared
under the same. A difference is to the reference's runs with the same seeds; their mean stands beside its name. Final
weights of decoder 1."""
SURE_ALONE = """The interval is bootstrapped over the test cases, each averaged over its seeds: where the mean over many
more cases like these would lie, with 95 % confidence. Final weights of decoder 1."""
SURE_PUBLISHED = """As above, but of the weights of the best check, as published figures compare. Each run was chosen
for doing well on these very cases: its mean is optimistic, and intervals and p know nothing of that."""
ABLATIONS = "Variants that differ from MLRPL in one thing; the tables are in the notebook. Final weights of decoder 1."
RELIABILITY = "AUROC of each measure of HR as a predictor of a right pseudo-label; 0.5 is chance."
TERMS = """**MLRPL** trains one encoder with two decoders that learn from each other's pseudo-labels: where the other is
surer (**WR**, which), and weighted by how well its features agree with its class's mean (**HR**, how). **Control**:
MLRPL without that mutual loss, β = 0; **β** is the weight of a method's unsupervised loss. **Decoder 1**: the one that
the published code evaluates. **s0**, **s1**: runs with the seeds 0 and 1. **Dice** and **Jaccard**: overlap with the
reference. **95HD**: 95th percentile of the distances between the two surfaces, both ways; **ASD**: mean distance from
the predicted surface to the reference's. **AUROC**: how often a right pseudo-label has the higher weight of a right and
a wrong one. In the list of runs, **key** stands for settings, data and version of the method; **own** rows were made
where this page was, **adopted** ones in another sitting, or for another study."""
CAPTIONS = {
    "distributions": "Each dot a test case, mean over its classes and seeds, of the final weights of decoder 1; grey "
    "lines join the same case.",
    "label-efficiency": "Final weights of decoder 1; a bar reaches from the lowest seed to the highest.",
    "learning-curves": "Where a collapse would be seen: the foreground of the pseudo-labels goes towards nothing or "
    "everything, while the labelled batches' Dice goes on rising; where training is thrown out, that Dice falls too. "
    "Losses are not on one scale. Supervised: MLRPL's is the sum of its decoders' Dice losses, V-Net's the mean of "
    "Dice loss and cross-entropy. Unsupervised: MLRPL's mutual loss, another method's own consistency, before β; it is "
    "logged where β is 0, too.",
    "checks": "Every check on the test cases. Where there are several seeds, faint lines are theirs and the strong one "
    "is their mean; of each seed the best check, which *published* selects, and the end of training are marked.",
    "precision": "Running means over a fortieth of training; bold is the mean over seeds, the band float32's range.",
    "differences": "Paired differences over the test cases, each averaged over its seeds; p after Holm's "
    "correction. Where there are several seeds, each has a mark: what other trainings may do to a difference.",
    "reliability-which": "Share of right pseudo-labels among those that WR keeps and drops, beside the surest of the "
    "same batch, as many as WR keeps of all classes together. The class is the pseudo-label's, the distance "
    "that to the reference's boundary, which is the nearest voxel of another class.",
    "reliability-coverage": "Of all voxels, and where the decoders disagree, star and diamond keep equally many of "
    "each batch: where the star is higher, WR chooses better than confidence does. Of one class they may keep "
    "different shares. Thresholds on the line are the same for all batches.",
    "reliability-how": "How well each measure's weight tells right pseudo-labels from wrong ones; dotted: chance.",
    "reliability-diagram": "Ten groups of equal size, from the lowest weights to the highest, for HR's weight and for "
    "the largest probability.",
    "contours": "Best, median and worst test case by the Dice of the first seed of the method that the others are "
    "compared with (of the first method where it is not there), on the x–y slice where the reference is largest. Every "
    "method's first seed, final weights of decoder 1.",
}
