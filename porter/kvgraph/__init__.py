"""KV-cache schemes in the graph: functions that append to a scheme's buffers and read them, and rewriting."""
