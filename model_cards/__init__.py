"""The cards of OpenAI's nine models: one template, the figures they quote, and the command that writes them.

python -m model_cards            # write the nine cards and the picture
python -m model_cards --check    # say what differs
"""

from hf_clip.hub.openai_cards import CHART, render_card, render_custom_card

__all__ = ["CHART", "render_card", "render_custom_card"]
