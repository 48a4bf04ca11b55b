package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"masquevpn/internal/control"
	"masquevpn/internal/fault"
	"masquevpn/internal/hostdns"
	"masquevpn/routing"
)

// upstreamFile is where systemd-resolved names the servers that it asks, in the
// format of resolv.conf(5).
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
			logger.Warn("kill_switch.allow lacks what "+list.key+
				" has outside the tunnel: the kill switch stops it", "held", blocked)
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

// upstreamServers returns the nameservers that the resolver of this host asks,
// as host:port; none where it is not known.
func upstreamServers() []string {
	data, err := os.ReadFile(upstreamFile)
	if err != nil {
		return nil
	}
	var servers []string
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && !a.IsLoopback() {
			servers = append(servers, net.JoinHostPort(a.String(), "53"))
		}
	}
	return servers
}

// staysClosed is the remedy for a tunnel that ended with its kill switch
// closed.
func staysClosed(name string) string {
	return fmt.Sprintf("the kill switch stays closed, until: %s down %s", program, name)
}

// withRemedy is err with one more remedy.
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

// closedKillSwitch says whether the kill switch of a tunnel is known to be
// closed.
func closedKillSwitch(name string) bool {
	closed, err := (&routing.KillSwitch{Instance: name}).Closed()
	return err == nil && closed
}

// cleanUp does for a tunnel that does not run what its process would have done
// at its end, and lifts its kill switch. The error is that of a tunnel that
// does not run if there was nothing to do.
func (o *options) cleanUp(name string) error {
	lock, err := acquire(o.RunDir, name) // keeps it from starting meanwhile
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
