"""The place where a watch stores its alerts: the ledger on disk, or a list in memory."""

from typing import Protocol, runtime_checkable

from molehunt.watch.alert import Alert


@runtime_checkable
class AlertStore(Protocol):
    """The methods that a watch needs of a store of alerts. `Ledger` is one."""

    def record(self, alert: Alert) -> None:
        """Store a new alert."""
        ...

    def get(self, id: str) -> Alert | None:
        """The alert of that id, or None."""
        ...

    def recent(self, limit: int) -> list[Alert]:
        """Up to `limit` alerts, newest first."""
        ...


class AlertList:
    """Alerts in memory, for a watch without a folder.

    Args:
        alerts: those that an earlier watch recorded, oldest first.
        no_text: whether texts are stripped from every alert that is recorded.
    """

    def __init__(self, alerts: tuple[Alert, ...] = (), *, no_text: bool = False) -> None:
        self._alerts = {alert.id: alert for alert in alerts}
        self._no_text = no_text

    @property
    def alerts(self) -> tuple[Alert, ...]:
        """All of them, oldest first."""
        return tuple(self._alerts.values())

    def record(self, alert: Alert) -> None:
        self._alerts[alert.id] = alert.without_text() if self._no_text else alert

    def get(self, id: str) -> Alert | None:
        return self._alerts.get(id)

    def recent(self, limit: int) -> list[Alert]:
        return list(reversed(self._alerts.values()))[:limit]
