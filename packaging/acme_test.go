package packaging

import (
	"strings"
	"testing"
	"time"
)

// certificates makes an ACME server that issues certificates for the proxy's
// name, and a proxy that gets its certificate there. The proxy's start takes
// longer than TimeoutStartSec.
const certificates = `set -e
ip link set lo up
echo "127.0.0.1 vpn.example.org acme.example" >> /etc/hosts
masque-proxy init --name acme.example /root/acme
cat > /root/acme/pebble.json <<END
{"pebble": {"listenAddress": "127.0.0.1:14000", "managementListenAddress": "127.0.0.1:15000",
 "certificate": "/root/acme/proxy.crt", "privateKey": "/root/acme/proxy.key", "httpPort": 80, "tlsPort": 443}}
END
masque-proxy init --name vpn.example.org --acme admin@example.org --agree-tos --acme-directory https://acme.example:14000/dir /etc/masque
cp /root/acme/ca.crt /etc/masque/acme-ca.crt
sed -i 's/^#ca = /ca = /' /etc/masque/proxy.toml
mkdir -p /etc/systemd/system/masque-proxy.service.d
printf '[Service]\nTimeoutStartSec=3s\n' > /etc/systemd/system/masque-proxy.service.d/test.conf
systemctl daemon-reload
`

// While the service waits for its first certificate, systemd waits too and
// shows the reason. The sandbox of the service lets it obtain a certificate.
func TestServiceWaitsForCertificate(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.do(install)
	m.do(certificates)
	m.do("systemctl start --no-block masque-proxy")
	m.until("systemd shows the reason", func() bool {
		return strings.Contains(m.do("systemctl show -P StatusText masque-proxy"),
			"no certificate yet, tried again at ")
	})
	pid := m.mainPID("masque-proxy")
	time.Sleep(6 * time.Second) // longer than TimeoutStartSec
	m.is("systemctl show -P ActiveState masque-proxy", "activating")
	m.is("systemctl show -P MainPID masque-proxy", pid)

	m.do("systemd-run --unit=pebble -E PEBBLE_VA_NOSLEEP=1 pebble -config /root/acme/pebble.json")
	m.until("the ACME server answers", func() bool {
		return strings.Contains(m.do("masque-proxy check -c /etc/masque/proxy.toml --online || true"), "https://acme.example:14000/dir answers")
	})
	m.do("masque-proxy reload")
	m.until("the proxy serves", func() bool {
		return m.command("systemctl is-active masque-proxy").Run() == nil
	})
	m.is("systemctl show -P MainPID masque-proxy", pid)
	m.is("stat -c '%U %a' /var/lib/masque/acme /var/lib/masque/acme/reset.key",
		"masque 700\nmasque 600")
	m.do("systemctl restart masque-proxy") // uses the stored certificate
	m.do("masque-proxy status")
}
