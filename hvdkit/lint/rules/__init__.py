"""The rules by code: HVD1 start, 2 optimizer, 3 data, 4 callbacks and output, 5 collectives, 6 remains of Keras 2."""

from hvdkit.lint.finding import Rule
from hvdkit.lint.rules import callbacks, collectives, data, keras2, optimizer, output, starting

RULES = (
    Rule("HVD101", starting.not_initialised),
    Rule("HVD102", starting.initialised_late),
    Rule("HVD103", starting.uses_no_hvdkit),
    Rule("HVD201", optimizer.not_distributed),
    Rule("HVD202", optimizer.learning_rate_not_scaled),
    Rule("HVD203", optimizer.clipped_too_early),
    Rule("HVD301", data.not_sharded),
    Rule("HVD302", data.shuffled_differently),
    Rule("HVD401", callbacks.nothing_broadcast),
    Rule("HVD402", callbacks.metrics_not_averaged),
    Rule("HVD403", output.written_by_all),
    Rule("HVD404", output.shown_by_all),
    Rule("HVD501", collectives.on_some_ranks),
    Rule("HVD601", keras2.horovods_keras_layer),
    Rule("HVD602", keras2.removed_arguments),
    Rule("HVD603", keras2.removed_names),
    Rule("HVD604", keras2.legacy_keras),
)
