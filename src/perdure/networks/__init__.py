"""Networks and heads. They know nothing of tasks beyond growing classifiers."""
