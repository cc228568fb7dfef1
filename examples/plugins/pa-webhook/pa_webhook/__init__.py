"""Posts to a webhook, such as Slack's, when a training run starts, ends or fails."""

from pa_webhook.plugin import WebhookPlugin

__all__ = ["WebhookPlugin"]
