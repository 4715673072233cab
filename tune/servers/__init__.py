"""What renders: ComfyUI, the web UIs and the model that ships, behind one protocol (`backend.py`)."""
