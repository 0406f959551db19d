"""An OpenAI-compatible server whose sessions keep their fast weights between requests and restarts.

Data flows one way: ``app.py`` (HTTP, with ``schemas.py``) -> ``sessions.py`` (which session a request runs
on, with ``conversation.py``, ``residents.py``, ``store.py``) -> ``engine.py`` (tokens in, tokens out, with
``sampling.py`` and ``text.py``, on the thread of ``worker.py``) -> ``ttt.Session``. ``launch.py``
puts them together. May be changed here: nothing; ``import ttt_compiler`` must not import FastAPI.
"""
