"""Which fleet a command is about: its devices, its plan if there is a bundle, its broker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.link import BrokerAddress
from agent.monitor.events import Names
from agent.protocol.errors import ShoalError
from agent.protocol.fleet import BrokerSettings, Fleet, load_fleet
from agent.protocol.manifest import Manifest, check_files, read_manifest
from agent.protocol.topics import Topics


@dataclass(frozen=True)
class Target:
    """A fleet to talk to.

    Attributes:
        manifest: The bundle's, None where only a fleet file was named.
        broker: Where to connect, with user and password.
    """

    fleet: Fleet
    manifest: Manifest | None
    broker: BrokerAddress

    @property
    def topics(self) -> Topics:
        """The fleet's topics."""
        return Topics(self.fleet.fleet)

    @property
    def names(self) -> Names:
        """Names of the plan's nodes and classes; none without a bundle."""
        return Names() if self.manifest is None else Names.of(self.manifest)


def open_target(
    bundle: Path | None, fleet_file: Path | None, broker: tuple[str, int] | None = None
) -> Target:
    """Read the fleet of a bundle, or of a fleet file, and where its broker is.

    Args:
        bundle: Folder of the bundle; None: there is no plan, only a fleet.
        fleet_file: Read instead of the bundle's copy.
        broker: (host, port) instead of the file's; user and password stay the file's.

    Raises:
        ManifestError: the bundle is unreadable.
        BundleMismatch: its fleet file was altered.
        FleetFileError: the fleet file has mistakes.
        ShoalError: neither was named, or the password file cannot be read.
    """
    manifest = None if bundle is None else read_manifest(bundle)
    if fleet_file is None:
        if bundle is None or manifest is None:
            raise ShoalError(
                "neither a bundle nor a fleet file is named", "add --bundle or --fleet"
            )
        check_files(bundle, [manifest.fleet])
        fleet_file = bundle / manifest.fleet.path
    fleet = load_fleet(fleet_file)
    return Target(fleet, manifest, broker_address(fleet.broker, fleet_file.parent, broker))


def devices_of(manifest: Manifest) -> set[str]:
    """Ids of the devices that have a part in a bundle's plan."""
    return {node.device for strategy in manifest.plan.strategies for node in strategy.nodes}


def broker_address(
    settings: BrokerSettings, folder: Path, override: tuple[str, int] | None = None
) -> BrokerAddress:
    """A fleet file's broker, with the password from its file.

    Args:
        settings: Of the fleet file.
        folder: Where the fleet file lies; a relative password file is looked for from there.
        override: (host, port) instead of the file's.

    Raises:
        ShoalError: the password file cannot be read or is empty.
    """
    host, port = override or (settings.host, settings.port)
    password = None
    if settings.password_file is not None:
        path = folder / settings.password_file.expanduser()
        try:
            password = path.read_text(encoding="utf-8").partition("\n")[0].rstrip("\r")
        except (OSError, UnicodeDecodeError) as error:
            raise ShoalError(
                f"the broker's password file {path} cannot be read: "
                f"{getattr(error, 'strerror', None) or 'not UTF-8 text'}",
                "its first line must be the password; a relative broker.password_file counts from "
                f"the folder of the fleet file, here {folder}",
            ) from None
        if not password:
            raise ShoalError(f"the broker's password file {path} has an empty first line")
    return BrokerAddress(host, port, settings.username, password)
