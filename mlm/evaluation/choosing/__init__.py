"""Which of n results to keep: rules on what is known of each, apart from any model.

    bayes_risk      the result that the others agree with most, by a metric
    utilities       those metrics, of every pair of texts at once
    noisy_channel   how well the source follows from a result, and how fluent it is, beside the model's own score
    energy          draws again, so that statistics of the texts become those of human ones
    agreement       the answer that most results end in

`mlm.session.choosing` gives them the results of a run. How to decide in a tree of labels: `mlm.evaluation.hierarchy`.
"""
