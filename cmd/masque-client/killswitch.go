package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"masquevpn/internal/control"
	"masquevpn/internal/dnsclient"
	"masquevpn/internal/fault"
	"masquevpn/internal/hostdns"
	"masquevpn/routing"
)

// upstreamFile is the file with the upstream servers of systemd-resolved, in
// the format of resolv.conf(5).
const upstreamFile = "/run/systemd/resolve/resolv.conf"

// killSwitch returns the kill switch of the tunnel.
func (l *loaded) killSwitch(name string) *routing.KillSwitch {
	return &routing.KillSwitch{Instance: name, Mark: l.file.Mark, Allow: l.file.KillSwitchAllow,
		Logger: l.config.Logger}
}

// warnBlocked logs the networks that the configuration excludes from the tunnel
// or advertises, and that the kill switch blocks.
func (l *loaded) warnBlocked(logger *slog.Logger) {
	for _, list := range []struct {
		key      string
		prefixes []netip.Prefix
	}{{"routes.exclude", l.file.Exclude}, {"routes.advertise", l.file.AdvertiseRoutes}} {
		if blocked := outside(list.prefixes, l.file.KillSwitchAllow); len(blocked) > 0 {
			logger.Warn("kill_switch.allow lacks networks of "+list.key+
				": the kill switch blocks them", "held", blocked)
		}
	}
}

// outside returns the prefixes that are not part of an allowed one.
func outside(prefixes, allow []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool {
		return slices.ContainsFunc(allow, func(a netip.Prefix) bool {
			return a.Bits() <= p.Bits() && a.Overlaps(p)
		})
	})
}

// upstreamServers returns the nameservers that the resolver of this host asks.
// It returns none where they are not known.
func upstreamServers() []netip.AddrPort {
	return slices.DeleteFunc(dnsclient.ReadConfig(upstreamFile).Servers,
		func(a netip.AddrPort) bool {
			return a.Addr().IsLoopback()
		})
}

// staysClosed returns the remedy for a tunnel that ended with its kill switch
// closed.
func staysClosed(name string) string {
	return fmt.Sprintf("the kill switch stays closed, until: %s down %s", program, name)
}

// withRemedy returns err with an additional remedy.
func withRemedy(err error, remedy string) *fault.Error {
	e, ok := errors.AsType[*fault.Error](err)
	if !ok {
		return &fault.Error{Kind: fault.Failure, Reason: err.Error(), Remedy: remedy}
	}
	with := *e
	if with.Remedy != "" {
		remedy = with.Remedy + "; " + remedy
	}
	with.Remedy = remedy
	return &with
}

func (o *options) journal(name string) string { return filepath.Join(o.RunDir, name+".journal") }

// closedKillSwitch reports whether the kill switch of a tunnel is closed. It
// returns false if that is not known.
func closedKillSwitch(name string) bool {
	closed, err := (&routing.KillSwitch{Instance: name}).Closed()
	return err == nil && closed
}

// cleanUp restores the host after a tunnel whose process is gone, and lifts its
// kill switch. If there is nothing to clean up, it returns the error of
// notRunning.
func (o *options) cleanUp(name string) error {
	lock, err := acquire(o.RunDir, name) // prevents a start during the cleanup
	if running, _ := control.Running(o.RunDir, name); err != nil && running {
		return &fault.Error{Kind: fault.Failure, Reason: name + " is starting or stopping",
			Remedy: "try again"}
	}
	if err != nil {
		return err
	}
	logger := o.Log.Logger(os.Stderr)
	found, err := routing.Clean(routing.Config{Instance: name, Journal: o.journal(name),
		Logger: logger})
	resolver, dnsErr := hostdns.Clean(hostdns.Config{Instance: name, Logger: logger})
	closed, liftErr := (&routing.KillSwitch{Instance: name, Logger: logger}).Lift()
	err = errors.Join(err, dnsErr, liftErr, lock.Release())
	switch {
	case errors.Is(err, os.ErrPermission):
		return &fault.Error{
			Kind:   fault.Privileges,
			Reason: fmt.Sprintf("%s: not running, and this user may not see whether its kill switch is closed", name),
			Remedy: "run it with sudo",
		}
	case err != nil:
		return err
	case !found && !resolver && !closed:
		return notRunning(name)
	}
	return nil
}
