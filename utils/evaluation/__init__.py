"""The proof: does the adaptation help? Which runs take part, what is scored, what follows, how it is shown.

run_groups       the runs that are compared: one group for each seed, with its controls
controls         training what a comparison lacks, by the pipeline's own scripts
baseline_weight  the weight of the task adapter alone, chosen on dev where the composed model's were
scored_rows      each row as an adapter on one loaded base; scoring it
served_rows      generated answers from an engine, where there is one
measures         from per-item scores to numbers with intervals, contrasts, examples
intervals        paired intervals over documents and seeds       verdict   four contrasts and the word that follows
one_adapter      the same where there is only a task or only a domain adapter
test_reads       how often a test split has been read            comparison   all of it, as `evaluate` runs it
learning_curve/  what twice the data would bring, from runs on parts of it
matrix/          several domain and task adapters: which pairs compose
report/          report.html and the table for a terminal        lm_eval/  the same test split in another program
evaluation_for_card  the evaluation of a composed model, for its card
"""
