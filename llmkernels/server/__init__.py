"""An OpenAI-compatible server on the reference engine.

protocol.py: what requests and responses look like.  chat.py: messages to a prompt.  metrics.py: what Prometheus reads.
app.py: the routes.
"""
