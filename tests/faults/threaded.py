"""A pytest plugin that starts a thread when it is imported, as tools that watch or send something do."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
