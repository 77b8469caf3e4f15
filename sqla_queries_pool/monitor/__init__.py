"""A page that shows every pool of the process, live, as a WSGI application."""

from .application import Monitor

__all__ = ["Monitor"]
