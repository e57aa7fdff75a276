"""The page in the browser: a reader of the daemon, with no state of its own.

``app`` has the routes, ``stream`` the live events, ``assets`` the files of the page, ``guard`` what
every answer is protected by.
"""
