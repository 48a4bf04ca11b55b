package main

import (
	"log/slog"
	"net"
	"slices"
	"strings"

	"masquevpn/internal/fault"
	"masquevpn/internal/systemd"
)

// socketName is the FileDescriptorName in masque-proxy.socket.
const socketName = "quic"

// sockets returns the sockets that systemd opened for the proxy. If there are
// any, the proxy ignores the key listen.
func (l *loaded) sockets(logger *slog.Logger) ([]*net.UDPConn, error) {
	sockets, err := systemd.UDPSockets(socketName)
	if err != nil {
		return nil, &fault.Error{Kind: fault.Usage, Reason: "from systemd: " + err.Error(),
			Remedy: "correct masque-proxy.socket"}
	}
	var opened []string
	for _, c := range sockets {
		opened = append(opened, c.LocalAddr().String())
	}
	if len(opened) > 0 && !slices.Equal(canonical(opened), canonical(l.file.Listen)) {
		logger.Warn("systemd opened other sockets than listen has: listen is ignored",
			"sockets", strings.Join(opened, ", "), "listen", strings.Join(l.file.Listen, ", "))
	}
	return sockets, nil
}

// canonical returns UDP addresses in sorted and uniform notation.
func canonical(addrs []string) []string {
	var list []string
	for _, s := range addrs {
		if a, err := net.ResolveUDPAddr("udp", s); err == nil {
			if a.IP == nil {
				a.IP = net.IPv6unspecified
			}
			s = a.String()
		}
		list = append(list, s)
	}
	slices.Sort(list)
	return list
}
