#!/bin/sh
# A fence agent for hosts with a BMC that speaks IPMI over LAN. Install as /usr/lib/pageport/fence-ipmi on every controller.
#
#   fence-ipmi [--folder FOLDER] [--within-seconds N] ACTION WORKER SITE
#
#   off      turns the host of WORKER off at once and ends with 0 only when the BMC says that it is off
#   status   prints "on" or "off"; changes nothing
#
# FOLDER (default /etc/pageport/fence) holds WORKER.conf with a line each for
#   host=ADDRESS              of the BMC
#   user=NAME                 with the IPMI privilege "operator"
#   password_file=FILE        readable for the user that controllers run as, and nobody else
#
# Needs ipmitool. The BMC must keep the host off: no watchdog that powers it on again, and a power restore policy other than
# "always-on" (ipmitool chassis policy). A BMC that has lost its power together with the host does not answer: then nobody
# knows, and this fails.
set -u

fail() {
    echo "$*" >&2
    exit 1
}

folder=/etc/pageport/fence
within_seconds=30
while [ $# -gt 0 ]; do
    case "$1" in
        --folder | --within-seconds)
            [ $# -ge 2 ] || fail "$1 needs a value"
            if [ "$1" = --folder ]; then folder=$2; else within_seconds=$2; fi
            shift 2
            ;;
        -*) fail "option $1 is unknown" ;;
        *) break ;;
    esac
done
[ $# -eq 3 ] || fail "usage: fence-ipmi [--folder FOLDER] [--within-seconds N] off|status WORKER SITE"
action=$1
worker=$2
case "$worker" in *[!a-z0-9-]* | "") fail "\"$worker\" is not the name of a worker" ;; esac
case "$within_seconds" in *[!0-9]* | "") fail "--within-seconds $within_seconds is not a number" ;; esac
command -v ipmitool >/dev/null || fail "ipmitool is not installed"

config=$folder/$worker.conf
[ -r "$config" ] || fail "$config is missing or cannot be read: it must name the BMC of $worker"
host='' user='' password_file=''
while IFS='=' read -r key value || [ -n "$key" ]; do
    case "$key" in
        host) host=$value ;;
        user) user=$value ;;
        password_file) password_file=$value ;;
        '' | '#'*) ;;
        *) fail "$config: key $key is unknown" ;;
    esac
done <"$config"
[ -n "$host" ] || fail "$config: host is missing"
[ -n "$user" ] || fail "$config: user is missing"
[ -r "$password_file" ] || fail "$config: password_file \"$password_file\" is missing or cannot be read"

bmc() {
    ipmitool -I lanplus -H "$host" -U "$user" -f "$password_file" "$@" 2>&1
}

# Prints "on" or "off"; anything else that the BMC says is a failure, with its words.
power() {
    said=$(bmc chassis power status) || { echo "$said"; return 1; }
    case "$said" in
        "Chassis Power is on") echo on ;;
        "Chassis Power is off") echo off ;;
        *) echo "$said"; return 1 ;;
    esac
}

case "$action" in
    status)
        now=$(power) || fail "ask the BMC $host of $worker for its power: $now"
        echo "$now"
        ;;
    off)
        # On a host that is off already some BMCs refuse: what counts is the status afterwards.
        answer=$(bmc chassis power off)
        left=$within_seconds
        while :; do
            now=$(power) && [ "$now" = off ] && break
            [ "$left" -gt 0 ] || fail "the BMC $host of $worker did not say \"off\" within $within_seconds s; power off: $answer; then: $now"
            left=$((left - 1))
            sleep 1
        done
        echo "the BMC $host says that $worker is off"
        ;;
    *) fail "action \"$action\" is unknown: use off or status" ;;
esac
