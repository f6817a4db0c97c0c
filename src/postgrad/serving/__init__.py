"""A server for a trained model: OpenAI's chat API over postgrad's own rendering and decoding.

batch.py       rows that are decoded together, which requests join and leave between two tokens
scheduler.py   the thread that owns the model: queue, limits, cancellation
text.py        tokens → text as it is written, and stop strings
protocol.py    what a request may hold and what a reply holds
guard.py       who may ask, and how much: before any request is read
answers.py     one request on its way: tokens in, pieces of text out
replies.py     pieces as JSON and as a stream of events
app.py         the routes
server.py      host, port and key; starting and stopping
"""
