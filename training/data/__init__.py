"""From text to batches: loading, filters, vocabulary and ids, in memory or from a stream."""
