#!/bin/sh
# apply.sh makes the patched copy of quic-go.
#
# usage: apply.sh FOLDER [PATCHES]
#
# Run it at the top of the repository. It does the following:
#   - copies the version of quic-go that go.mod names to FOLDER/quic-go,
#   - applies the files of PATCHES (default: internal/quicpatch/patches) in order,
#   - adds the files of internal/quicpatch/files,
#   - writes FOLDER/go.mod and FOLDER/go.sum, which replace the module by the copy,
#   - writes FOLDER/go.work, which does the same for tools without -modfile.
# If a step fails, it removes FOLDER and exits with status 1.
set -eu

module=github.com/quic-go/quic-go
version=v0.64.1 # the version that the patches are made for
folder=$1
case $folder in /*) ;; *) folder=./$folder ;; esac # go.mod requires ./ before relative paths
here=internal/quicpatch
patches=${2:-$here/patches}

# Ignore the flags of make and any go.work file: they would replace the module.
export GOFLAGS=-mod=readonly GOWORK=off

fail() {
	echo "quicpatch: $*" >&2
	rm -rf "$folder"
	exit 1
}

rm -rf "$folder"
go mod download "$module" || fail "cannot download $module"
found=$(go list -m -f '{{.Version}}' "$module")
[ "$found" = "$version" ] ||
	fail "the patches are for $module $version, but go.mod names $found: see docs/quic-go.md, \"Moving to another version\""

mkdir -p "$folder"
cp -r "$(go list -m -f '{{.Dir}}' "$module")" "$folder/quic-go"
chmod -R u+w "$folder/quic-go"
for patch in "$patches"/*.patch; do
	# Without GIT_DIR, git would skip the folder, because the repository
	# around it ignores it.
	(cd "$folder/quic-go" && GIT_DIR=/nonexistent git apply -) <"$patch" ||
		fail "$patch does not apply to $module $version"
done
(cd "$here/files" && find . -name '*.go') | while read -r file; do
	[ ! -e "$folder/quic-go/$file" ] || { echo "quicpatch: $file exists in quic-go" >&2; exit 1; }
	mkdir -p "$(dirname "$folder/quic-go/$file")"
	cp "$here/files/$file" "$folder/quic-go/$file"
done || fail "files/ does not fit $module $version"

cp go.mod "$folder/go.mod"
cp go.sum "$folder/go.sum"
go mod edit -replace="$module=$folder/quic-go" "$folder/go.mod"

cat >"$folder/go.work" <<WORK
go $(go list -m -f '{{.GoVersion}}')

use $(pwd)

replace $module => ./quic-go
WORK
